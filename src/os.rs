//! Every call that changes a file, each with a label that a test can make fail.
