"""An adapter for others: what of it is shared, under what terms, and how it reaches the Hugging Face hub.

The one place besides `models` that knows `huggingface_hub`.
"""

from true_kd.publishing.parcel import Parcel, Wishes, packed
from true_kd.publishing.upload import Destination, Uploaded, check_destination, upload

__all__ = ["Destination", "Parcel", "Uploaded", "Wishes", "check_destination", "packed", "upload"]
