"""The OpenAI-compatible HTTP edge, over the same core as gRPC. `app.build_app` makes it."""
