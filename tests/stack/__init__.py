"""The real parts that tss talks to, for tests and for people: `bin/stack --help`.

`install` gets them onto the machine, `stack` runs them, `proxy` stands in front of the catalog and misbehaves.
"""

from tests.stack.install import InstallError, install
from tests.stack.proxy import Fault, Lakekeeper, RestProxy
from tests.stack.stack import (
    Part,
    Stack,
    StackError,
    cluster_options,
    join_cluster,
    redis_part,
    s3_filesystem,
)

__all__ = [
    "Fault",
    "InstallError",
    "Lakekeeper",
    "Part",
    "RestProxy",
    "Stack",
    "StackError",
    "cluster_options",
    "install",
    "join_cluster",
    "redis_part",
    "s3_filesystem",
]
