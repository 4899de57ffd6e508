"""What the API and the worker share: records, claims, objects, the queue. No paddle, no FastAPI."""
