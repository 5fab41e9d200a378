"""HTTP for the clients of LoRAX, OpenAI, TGI and vLLM's adapter management.

A gRPC client of the server, in a process of its own (`lorastack gateway`) or on a thread of the
server's (`lorastack serve --http-port`). It knows nothing of the engine.
"""
