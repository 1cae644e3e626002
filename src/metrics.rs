//! What the process counts, for `GET /metrics`: each part registers its own numbers when it is made.
//!
//! Names start with `live_meeting_` and end with their unit; counters get `_total` behind it. A number that somebody keeps anyway is read when it is
//! asked for: [`Metrics::gauge_of`], [`Metrics::counter_of`].

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge as RawGauge;
use prometheus_client::metrics::{MetricType, counter::Counter as RawCounter};
use prometheus_client::registry::{Metric, Registry};

const PREFIX: &str = "live_meeting";

/// Grows only. Cheap to clone; a clone counts the same.
pub type Counter = RawCounter;
/// Goes up and down. Cheap to clone; a clone counts the same.
pub type Gauge = RawGauge;

/// Everything that is counted. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Mutex<Registry>>);

/// Counters of one name, told apart by the value of one label, of which there are few.
#[derive(Debug, Clone)]
pub struct CountersBy {
    label: &'static str,
    family: Family<[(&'static str, &'static str); 1], Counter>,
}

impl CountersBy {
    pub fn of(&self, value: &'static str) -> Counter {
        self.family.get_or_create(&[(self.label, value)]).clone()
    }
}

/// Counts by classes, such as those of durations.
pub trait Histogram: Send + Sync + 'static {
    fn snapshot(&self) -> HistogramSnapshot;
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramSnapshot {
    /// Of everything observed.
    pub sum: f64,
    /// The upper bound of each class, and what fell in it and in none before; the last bound is infinite.
    pub classes: Vec<(f64, u64)>,
}

impl Metrics {
    /// A number that grows. `name` without prefix and `_total`.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.register(name, help, counter.clone());
        counter
    }

    /// Numbers that grow, one for each value of a label.
    pub fn counters_by(&self, name: &str, label: &'static str, help: &str) -> CountersBy {
        let family = Family::default();
        self.register(name, help, family.clone());
        CountersBy { label, family }
    }

    /// A number that goes up and down. `name` without prefix.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.register(name, help, gauge.clone());
        gauge
    }

    /// A number that is read when it is asked for.
    pub fn gauge_of(&self, name: &str, help: &str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.register(name, help, Read { kind: MetricType::Gauge, read: Box::new(read) });
    }

    /// A number that grows, read when it is asked for.
    pub fn counter_of(&self, name: &str, help: &str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.register(name, help, Read { kind: MetricType::Counter, read: Box::new(read) });
    }

    /// A number of the process under the name that all programs have for it.
    pub fn process_gauge_of(&self, name: &str, help: &str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.lock().register(name, help, Read { kind: MetricType::Gauge, read: Box::new(read) });
    }

    /// A histogram that somebody keeps.
    pub fn histogram_of(&self, name: &str, help: &str, histogram: Arc<impl Histogram>) {
        self.register(name, help, Kept(histogram));
    }

    /// All of it in the OpenMetrics text format, which is Prometheus' own.
    ///
    /// # Errors
    /// Never: text can always be written to memory.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut all = String::new();
        text::encode(&mut all, &self.lock())?;
        Ok(all)
    }

    fn register(&self, name: &str, help: &str, metric: impl Metric) {
        // A full stop is added to every help.
        self.lock().register(format!("{PREFIX}_{name}"), help.trim_end_matches('.'), metric);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Read {
    kind: MetricType,
    read: Box<dyn Fn() -> f64 + Send + Sync>,
}

impl fmt::Debug for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Read")
    }
}

impl EncodeMetric for Read {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let value = (self.read)();
        match self.kind {
            MetricType::Counter => encoder.encode_counter::<NoLabelSet, f64, f64>(&value, None),
            MetricType::Gauge | MetricType::Histogram | MetricType::Info | MetricType::Unknown => encoder.encode_gauge(&value),
        }
    }

    fn metric_type(&self) -> MetricType {
        self.kind
    }
}

struct Kept<H>(Arc<H>);

impl<H> fmt::Debug for Kept<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

impl<H: Histogram> EncodeMetric for Kept<H> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let HistogramSnapshot { sum, classes } = self.0.snapshot();
        let count = classes.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &classes, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
