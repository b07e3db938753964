"""Matrix products and weight formats that are faster or smaller than the stock ones."""
