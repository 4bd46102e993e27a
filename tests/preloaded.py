"""What the server that `conftest.start` forks from has done beforehand: imports, of which these a command does only when it
needs them, and what is made once in a process: fonts and settings. None of it may start a thread."""

from contextlib import redirect_stdout, suppress
from io import StringIO

import alembic.command  # noqa: F401
import attrs  # noqa: F401
import mlflow.store.tracking.sqlalchemy_workspace_store  # noqa: F401
import numpy as np
import rich._emoji_codes  # noqa: F401
import sklearn.datasets  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
import supervision  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401
from conftest import prepare
from PIL import Image
from sqlalchemy.orm import configure_mappers

import datamodules
import modules
import modules.callbacks.support_vectors
import modules.networks.registered
import pipelines.engine.start
import pipelines.serving.answers
import pipelines.serving.registration  # noqa: F401
from modules.pictures.charts import confusion_matrix
from pipelines.classification import classification

for package in (modules, datamodules):
    for name in package.__all__:
        getattr(package, name)

prepare()
configure_mappers()
Image.init()
confusion_matrix(np.eye(2, dtype=np.int64), ["0", "1"])
with redirect_stdout(StringIO()), suppress(SystemExit):
    classification(["fit", "--help"])
