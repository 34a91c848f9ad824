//! All tests that are not beside the code, in one binary.

// The command line: the real program with real files, no mount.
mod cli;
// The rules of the source tree that no compiler checks.
mod tidy;
