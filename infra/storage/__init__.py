# ruff: noqa: F401  what is imported here is what the package offers
"""The only place that makes anything durable: single files, and directories whose files belong together.

Places are paths of a local or shared file system, or s3://BUCKET/PREFIX. `write_file`, `write_text` and
`write_bytes` write one file (`single.py`). `begin`, `writing`, `publish` and `reading` are for directories
that are whole or do not exist (`directories.py`). `Files` holds small files by name, and `stored` lists what
others wrote, to be read in place. docs/storage.md says how S3 is set up.
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
from infra.storage.each import each
from infra.storage.files import Files
from infra.storage.local import (
    Location,
    StorageError,
    local,
)
from infra.storage.lock import owned
from infra.storage.manifest import file_digest, files_digest
from infra.storage.single import (
    copy_file,
    exists,
    fetched,
    folders,
    on_disk,
    read_bytes,
    scratch,
    uploading,
    write_bytes,
    write_file,
    write_text,
)
from infra.storage.stored import Stored, stored, stored_below, stored_file
