"""Ask a running server: python examples/client.py "Question" [LORA_ID [MEDUSA_ID]]"""

import sys

from lorastack.client import ChatMessage, ChatMessages, Client, GenerateRequest

question, lora_id, medusa_id = [*sys.argv[1:], "", ""][:3]
chat = ChatMessages(messages=[ChatMessage(role="user", content=question)])
with Client("127.0.0.1:50051") as client:
    for part in client.stream(GenerateRequest(chat=chat, lora_id=lora_id, medusa_id=medusa_id)):
        print(part.text, end="", flush=True)
