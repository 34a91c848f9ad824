//! The command line: the real program, its output and its exit codes.
