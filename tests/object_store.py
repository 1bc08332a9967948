"""A local S3 server for tests."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.config import conf, set_conf_env
from moto.server import ThreadedMotoServer

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def object_store() -> Iterator[str]:
    """URL of a folder in a bucket of its own."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    changed = {**CREDENTIALS, "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    kept = dict(conf)
    try:
        set_conf_env(conf)
        bucket = f"vespo-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(bucket)
        yield f"s3://{bucket}/run"
    finally:
        conf.clear()
        conf.update(kept)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()
