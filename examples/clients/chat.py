"""Chat with a BWLA server, or any other with OpenAI's API: an answer, a streamed answer, and a tool call.

    vllm serve ./my-model-bwla --quantization bwla
    python examples/clients/chat.py "Why is the sky blue?"

Requires `pip install openai`. Chat requires a model with a chat template; for one without, such as the example model,
start the server with --chat-template examples/clients/plain_chat.jinja. Tools require a model that was trained to call
them, and a server started with --enable-auto-tool-choice --tool-call-parser NAME (hermes for Qwen3).
"""

import argparse
import json
from typing import Any

from openai import APIConnectionError, BadRequestError, OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Get the current weather in a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}},
                "required": ["town"],
            },
        },
    }
]


def weather(town: str) -> str:
    """Return the weather; a real tool would look it up."""
    return f"Rain in {town}, 11 degrees."


def call_tools(client: OpenAI, model: str, max_tokens: int) -> str:
    """Offer a tool, run it when the model calls it, and return the answer."""
    messages: list[Any] = [{"role": "user", "content": "Do I need an umbrella in Bergen now?"}]
    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, max_tokens=max_tokens
        )
    except BadRequestError as error:
        return f"the server does not support tools: {error.message}"
    message = reply.choices[0].message
    if not message.tool_calls:
        return f"the model did not call a tool: {message.content}"
    messages.append(message)
    for call in message.tool_calls:
        result = weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    reply = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=max_tokens)
    return reply.choices[0].message.content or ""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    try:
        model = client.models.list().data[0].id
    except APIConnectionError as error:
        parser.exit(1, f"cannot connect to a server at {arguments.url}: {error}\n")
    options = {
        "model": model,
        "max_tokens": arguments.max_tokens,
        "messages": [{"role": "user", "content": arguments.prompt}],
    }
    print(f"{model}: {client.chat.completions.create(**options).choices[0].message.content}\n")
    print("streamed: ", end="")
    for event in client.chat.completions.create(**options, stream=True):
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
    print(f"\n\ntools: {call_tools(client, model, arguments.max_tokens)}")


if __name__ == "__main__":
    main()
