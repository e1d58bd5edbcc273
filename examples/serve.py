"""A server of vLLM's with this project's attention, asked through OpenAI's client: a long text, and a key hidden in it.

Run: make vllm-demo
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI, OpenAIError
from transformers import AutoTokenizer

from lserve_ext import models
from lserve_ext.eval import tasks

CONFIG = {"preset": "lserve", "page_size": 32, "streaming_heads": "smollm2-135m-instruct", "budget_tokens": 2048}


@contextlib.contextmanager
def served(model: str) -> Iterator[OpenAI]:
    """A client of a server that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` in other words: that command needs metadata which the CPU build of 0.32 lacks.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "8192", "--max-num-seqs", "8", "--additional-config", json.dumps({"lserve": CONFIG})]
    command += ["--enforce-eager", "--dtype", "float32"]  # starts faster; not every CPU has 16 bits
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ  # GB
    log, elsewhere = (
        Path("vllm.log").resolve(),
        tempfile.gettempdir(),
    )  # `python -m` imports what lies where it is started
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, cwd=elsewhere, stdout=file, stderr=subprocess.STDOUT)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
        while server.poll() is None:
            with contextlib.suppress(OpenAIError):
                client.models.list(timeout=5)
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"the server stopped, see {log}")
        yield client
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    model = str(models.converted(models.smollm2_path()))
    prompt, key = tasks.passkey_prompt(AutoTokenizer.from_pretrained(model), 6000)
    with served(model) as client:
        start = time.perf_counter()
        stream = client.completions.create(
            model=model, prompt=prompt[0].tolist(), max_tokens=16, temperature=0, stream=True
        )
        answer = ""
        for part in stream:
            if not answer:
                print(f"the first of {prompt.shape[1]:,} tokens' answer after {time.perf_counter() - start:.1f} s:")
            answer += part.choices[0].text
            print(part.choices[0].text, end="", flush=True)
        print(f"\nthe key was {key}: {'found' if key in answer else 'not found'}")


if __name__ == "__main__":
    main()
