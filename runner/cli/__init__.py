"""The command `runner`: one module a command, thin: it parses, calls, prints, and turns results into exit codes."""
