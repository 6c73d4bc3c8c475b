"""Row caches: the contract, attention storage, recurrent storage."""
