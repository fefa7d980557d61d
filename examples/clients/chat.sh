#!/bin/sh
# Ask a BWLA server with curl: the model's name, a completion, and a streamed chat.
#   sh examples/clients/chat.sh "Why is the sky blue?"
set -eu
url=${URL:-http://localhost:8000/v1}
prompt=${1:-The old man looked at the sea and}
model=$(curl --silent --fail "$url/models" | sed 's/.*"id": *"\([^"]*\)","object":"model".*/\1/')

curl --silent --show-error --fail-with-body "$url/completions" -H 'Content-Type: application/json' -d @- <<JSON
{"model": "$model", "prompt": "$prompt", "max_tokens": 32, "temperature": 0}
JSON
echo
curl --silent --show-error --fail-with-body --no-buffer "$url/chat/completions" -H 'Content-Type: application/json' -d @- <<JSON
{"model": "$model", "messages": [{"role": "user", "content": "$prompt"}], "max_tokens": 32, "stream": true}
JSON
