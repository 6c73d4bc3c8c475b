"""Files of requests: read as a stream, answered in order, taken up again where they stopped."""
