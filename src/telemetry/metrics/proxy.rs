//! What the proxy counts: requests by kind and outcome, waits, and what is open now.

use std::time::Instant;

use prometheus::{CounterVec, IntCounterVec, IntGauge, Opts};

use super::{Error, Register};

/// The metrics of the proxy. A label lookup a request is nothing beside the request.
#[derive(Debug, Clone)]
pub struct ProxyMetrics {
    requests: IntCounterVec,
    in_flight: IntGauge,
    waits: IntCounterVec,
    wait_seconds: CounterVec,
}

/// A request or a tunnel, counted until it is dropped.
#[derive(Debug)]
pub struct InFlight(IntGauge);

/// A wait that has begun.
#[derive(Debug)]
pub struct ProxyWait {
    metrics: ProxyMetrics,
    what: &'static str,
    begin: Instant,
}

impl ProxyMetrics {
    pub(super) fn register(register: &Register<'_>) -> Result<ProxyMetrics, Error> {
        let labels = &["kind", "outcome"];
        let requests = Opts::new("litefs_proxy_request_count", "Requests to the proxy.");
        let waits = Opts::new("litefs_proxy_wait_count", "Requests that had to wait.");
        let seconds = Opts::new("litefs_proxy_wait_seconds", "Time that requests have waited.");
        Ok(ProxyMetrics {
            requests: register.add(IntCounterVec::new(requests, labels)?)?,
            in_flight: register
                .gauge("litefs_proxy_in_flight", "Requests and tunnels of the proxy now.")?,
            waits: register.add(IntCounterVec::new(waits, &["for", "result"])?)?,
            wait_seconds: register.add(CounterVec::new(seconds, &["for"])?)?,
        })
    }

    /// A request or a tunnel begins.
    pub fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    /// A request was answered.
    pub fn count(&self, kind: &str, outcome: &str) {
        self.requests.with_label_values(&[kind, outcome]).inc();
    }

    /// A request begins to wait for `what`.
    pub fn wait(&self, what: &'static str) -> ProxyWait {
        ProxyWait { metrics: self.clone(), what, begin: Instant::now() }
    }
}

impl ProxyWait {
    /// The wait is over; `is_met`: it came.
    pub fn end(self, is_met: bool) {
        let result = if is_met { "met" } else { "late" };
        let ProxyMetrics { waits, wait_seconds, .. } = &self.metrics;
        waits.with_label_values(&[self.what, result]).inc();
        wait_seconds.with_label_values(&[self.what]).inc_by(self.begin.elapsed().as_secs_f64());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
