"""The reference table: M responses of the reference a prompt, their rewards, and what made them."""

from vbon_lightning.reference_table.fingerprint import FingerprintMismatch
from vbon_lightning.reference_table.json_lines import export_jsonl, import_jsonl
from vbon_lightning.reference_table.leases import PromptLeases
from vbon_lightning.reference_table.reader import OtherPrompt, PromptNotInTable, ReferenceTable
from vbon_lightning.reference_table.shards import ReferenceTableError, TableRow, joined_rows, prompt_key
from vbon_lightning.reference_table.store import TableStoreError, table_path
from vbon_lightning.reference_table.summary import table_summary
from vbon_lightning.reference_table.writer import ReferenceTableWriter

__all__ = [
    "FingerprintMismatch",
    "OtherPrompt",
    "PromptLeases",
    "PromptNotInTable",
    "ReferenceTable",
    "ReferenceTableError",
    "ReferenceTableWriter",
    "TableRow",
    "TableStoreError",
    "export_jsonl",
    "import_jsonl",
    "joined_rows",
    "prompt_key",
    "table_path",
    "table_summary",
]
