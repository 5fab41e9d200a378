"""The door: what every call and connection passes, whatever it asks for."""
