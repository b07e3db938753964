"""Who has done how much work for whom: signed receipts and the ledger that sums them."""
