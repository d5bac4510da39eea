"""Reference texts that ship with the package: general sentences whose features `keep` holds in place."""
