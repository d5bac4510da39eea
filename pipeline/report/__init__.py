"""What runs and sweeps showed, as one page with tables and figures."""
