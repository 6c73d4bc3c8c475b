"""The engine: unpadded batch speculation for any decoder."""
