"""Ask a running server: python examples/client.py "Question" [LORA_ID [MEDUSA_ID [HOST:PORT]]]"""

import sys

from lorastack.client import ChatMessage, ChatMessages, Client, GenerateRequest
from lorastack.errors import LorastackError

question, lora_id, medusa_id, server = [*sys.argv[1:], *[""] * 4][:4]
chat = ChatMessages(messages=[ChatMessage(role="user", content=question)])
try:
    with Client(server or "127.0.0.1:50051") as client:
        for part in client.stream(GenerateRequest(chat=chat, lora_id=lora_id, medusa_id=medusa_id)):
            print(part.text, end="", flush=True)
except LorastackError as error:
    sys.exit(f"{error.reason}: {error.message}")
