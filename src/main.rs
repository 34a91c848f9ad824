//! The `litefs` program.

fn main() {}
