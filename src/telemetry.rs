//! Log set-up and metrics.
