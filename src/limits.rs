//! Every bound on a queue, body, cache or wait, with the reason for its size.
