"""Plain transformers behind the server's streaming chat API, one request at a time.

    python bench/peers/transformers_server.py MODEL --port 8001 --threads 2

The peer of `retort serve` in bench/serve.py: `model.generate` in float32 at batch 1 with a text
streamer; requests wait for each other. Prompt and completion tokens are told in ``usage``.
"""

import argparse
import asyncio
import json
import threading

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transformers import TextIteratorStreamer

from retort.models import zoo


class Peer:
    def __init__(self, name):
        self.model = zoo.load_model(name, dtype="float32")
        self.tokenizer = zoo.load_tokenizer(name)
        self.turn = asyncio.Lock()

    async def chat(self, request):
        body = await request.json()
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return StreamingResponse(self.events(ids, body["max_tokens"]), 200, {}, "text/event-stream")

    async def events(self, ids, most):
        async with self.turn:
            streamer = TextIteratorStreamer(
                self.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            options = {"max_new_tokens": most, "do_sample": False, "streamer": streamer}
            result = {}
            thread = threading.Thread(target=self.generate, args=(ids, options, result))
            thread.start()
            while (text := await asyncio.to_thread(next, streamer, None)) is not None:
                yield event({"choices": [{"index": 0, "delta": {"content": text}}]})
            thread.join()
        prompt = ids["input_ids"].shape[1]
        usage = {"prompt_tokens": prompt, "completion_tokens": result["length"] - prompt}
        yield event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"

    @torch.no_grad()
    def generate(self, ids, options, result):
        result["length"] = self.model.generate(**ids, **options).shape[1]


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def health(request):
    return JSONResponse({"status": "ok"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer = Peer(options.model)
    routes = [
        Route("/v1/chat/completions", peer.chat, methods=["POST"]),
        Route("/health", health),
    ]
    uvicorn.run(Starlette(routes=routes), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
