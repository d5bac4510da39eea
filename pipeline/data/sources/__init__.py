"""Images as users keep them: folders, tables and archives."""
