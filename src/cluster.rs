//! Who is primary, and following one.
