"""The REST interface: FastAPI on uvicorn, offline, read only.

`app.create` makes the application, `run.run` serves it. Nothing here imports torch.
"""
