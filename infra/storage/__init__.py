# ruff: noqa: F401  what is imported here is what the package offers
"""The only place that makes anything durable: single files, and directories whose files belong together.

`write_file`, `write_text` and `write_bytes` write one file on a local or shared file system. `begin`,
`writing`, `publish` and `reading` are for directories that are whole or do not exist (`directories.py`).
`Files` holds small files by name, in a directory or under s3://. Whatever else is asked of s3:// is refused
in one sentence; docs/adding-a-storage-back-end.md says what a back end must give.
"""

from infra.storage.directories import (
    begin,
    clean,
    digests,
    discard,
    is_complete,
    manifest_digest,
    move,
    newest_complete,
    newest_sound,
    place,
    prune,
    publish,
    read_metadata,
    reading,
    verify,
    writing,
)
from infra.storage.files import Files
from infra.storage.local import (
    Location,
    StorageError,
    local,
    write_bytes,
    write_directory,
    write_file,
    write_text,
)
from infra.storage.manifest import file_digest, files_digest
from infra.storage.stored import Stored, stored
