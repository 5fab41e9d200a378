"""What tests of several packages share: tiny models, adapters, canaries, a reference."""
