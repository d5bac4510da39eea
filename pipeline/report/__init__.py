"""Results of runs and sweeps as one page with tables and figures."""
