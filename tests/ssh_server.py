"""An SSH server on loopback that runs what it is asked to, for clusters that are reached by SSH."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[dict[str, Any]]:
    """A server with keys of its own in ``folder``; yields what ``asyncssh.connect`` needs to get in."""
    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    host_key.write_private_key(folder / "host")
    user_key.write_private_key(folder / "user")
    user_key.write_public_key(folder / "user.pub")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ssh server")
    thread.start()
    running: set[subprocess.Popen[bytes]] = set()

    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            process.command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        running.add(child)
        await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
        ends = [asyncio.ensure_future(end) for end in (asyncio.to_thread(child.wait), process.wait_closed())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        kill(child)  # what a client has left is not kept
        process.exit(await asyncio.to_thread(child.wait))
        await asyncio.gather(*ends)
        running.discard(child)

    def kill(child: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(folder / "host")],
            authorized_client_keys=str(folder / "user.pub"),
            process_factory=handle,
            encoding=None,
        )

    async def stop(server: asyncssh.SSHAcceptor) -> None:
        for child in list(running):
            kill(child)
        server.close()
        await server.wait_closed()
        while running:
            await asyncio.sleep(0.05)
        await loop.shutdown_default_executor()

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    try:
        yield {
            "port": server.get_port(),
            "username": "anybody",
            "client_keys": [str(folder / "user")],
            "known_hosts": None,
        }
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
