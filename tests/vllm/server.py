"""`vllm serve` as a person starts it, on loopback or on another host: asked over HTTP, looked at, ended."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bench.hops.asking import PLACEHOLDER
from tests.hosts.namespaces import Host
from tests.vllm import runs, scenario

# As `bench.hops.asking.prompts` puts it. vLLM's own placeholders stand where the images do.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}"
    "{{ '" + PLACEHOLDER + "' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


class Server:
    """A running `vllm serve`. at: its port on loopback, or its Unix socket, which all networks reach."""

    def __init__(self, model: Path, process: subprocess.Popen[bytes], at: int | Path, log: Path) -> None:
        self.process = process
        self._model = model
        self._at = at
        self._log = log

    def log(self) -> str:
        """What it and its processes printed."""
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + runs.TIMEOUT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"it ended: {self.log()[-6000:]}"
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        raise AssertionError(f"no answer: {self.log()[-6000:]}")

    def ask(self, prompt: dict[str, Any]) -> list[Any]:
        """A prompt of `bench.hops.asking.prompts` as a chat of OpenAI's shape; as `answer` there."""
        parts = [_picture(image) for image in prompt["multi_modal_data"]["image"]]
        body = {
            "model": str(self._model),
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Say."}]}],
            "max_tokens": 2,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 3,
            "return_tokens_as_token_ids": True,
        }
        reply = json.loads(self._get("/v1/chat/completions", json.dumps(body).encode()))
        said = reply["choices"][0]["logprobs"]["content"]
        top = [sorted([_number(t), t["logprob"]] for t in token["top_logprobs"]) for token in said]
        return [[_number(token) for token in said], top]

    def ask_all(self, prompts: list[dict[str, Any]]) -> list[Any]:
        """All at once, each over a connection of its own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.ask, prompts))

    def metrics(self) -> dict[tuple[str, str, str], float]:
        """Our samples at /metrics: by name, hop and way."""
        return {
            (sample.name, sample.labels["hop"], sample.labels["way"]): sample.value
            for sample in self._samples()
            if sample.name.startswith("tensorferry_") and sample.name.endswith("_total")
        }

    def answered(self) -> dict[int, int]:
        """How many prompts each engine answered in full, as vLLM's own metrics say."""
        done: Counter[int] = Counter()
        for sample in self._samples():
            if sample.name == "vllm:request_success_total":
                done[int(sample.labels["engine"])] += int(sample.value)
        return dict(done)

    def _samples(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self._get("/metrics").decode()):
            yield from family.samples

    def ways(self) -> dict[int, dict[str, list[int]]]:
        """What each of its processes counted, by pid: tensors and bytes by role, hop and way."""
        import psutil

        from engine.vllm.counts import saved

        below = psutil.Process(self.process.pid).children(recursive=True)
        pids = {self.process.pid, *(process.pid for process in below)}
        return {
            process["pid"]: {
                f"{process['role']}: {hop}: {how}": [count, nbytes]
                for hop, how, count, nbytes in process["tensors"]
            }
            for process in saved()
            if process["pid"] in pids
        }

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(runs.TIMEOUT)

    def _get(self, path: str, body: bytes | None = None) -> bytes:
        with contextlib.closing(self._connection()) as connection:
            kind = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, kind)
            reply = connection.getresponse()
            content: bytes = reply.read()
        assert reply.status == HTTPStatus.OK, f"{reply.status} {reply.reason}: {content.decode()}"
        return content

    def _connection(self) -> http.client.HTTPConnection:
        if isinstance(self._at, int):
            return http.client.HTTPConnection("127.0.0.1", self._at, timeout=runs.TIMEOUT)
        return _OverUnix(self._at)


class _OverUnix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(runs.TIMEOUT)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def serving(model: Path, folder: Path, host: Host | None = None, **options: Any) -> Iterator[Server]:
    """`vllm serve` with those options, here or on a host with a network of its own; ended with all its
    processes if it is not yet.
    """
    template = folder / "chat.jinja"
    template.write_text(_TEMPLATE)
    at = _free_port() if host is None else folder / "http"
    listen = {"host": "127.0.0.1", "port": at} if host is None else {"uds": at}
    command = serve_command(model, chat_template=template, **listen, **options)
    log = folder / "log"
    with log.open("wb") as output:
        process = runs.start(command, output, host)
    server = Server(model, process, at, log)
    try:
        server.wait()
        yield server
    finally:
        runs.end(process)


def serve_command(model: Path, **options: Any) -> list[str]:
    """`vllm serve` of that model with what `scenario.arguments` adds."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    return [*command, *_command_line(scenario.arguments(options))]


def becomes(look: Callable[[], Any], expected: Any) -> None:
    """Wait for what the counters, which are saved and sent every second, will show."""
    deadline = time.monotonic() + runs.TIMEOUT
    while (found := look()) != expected:
        assert time.monotonic() < deadline, f"{found}, not {expected}"
        time.sleep(0.2)


def tensorferry(*arguments: str) -> Any:
    """What a command of ours prints as JSON."""
    command = [sys.executable, "-m", "engine", *arguments, "--json"]
    done = subprocess.run(
        command, env=runs.environment(), capture_output=True, timeout=runs.TIMEOUT, check=False
    )
    return json.loads(done.stdout)


def _command_line(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value))


def _picture(image: Any) -> dict[str, Any]:
    content = io.BytesIO()
    image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _number(token: dict[str, Any]) -> int:
    return int(token["token"].removeprefix("token_id:"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
