"""Entry points for `ray job submit`: one small module per job."""
