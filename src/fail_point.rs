//! Places where a test can make one part panic or hang: nothing in a build without the feature `fail-points`.
//!
//! A server process is told by `FAILPOINTS`, such as `track-audio=5*off->1*panic;writer-append=1*sleep(5000)`. A `sleep` blocks the thread, as a bug
//! may; a part that is to hang beside its thread is told `return(5000)`, and so are deadlines that a test cannot wait for.

pub use self::points::{deadline, hold, pass, set_up};

#[cfg(feature = "fail-points")]
mod points {
    use std::time::Duration;

    /// The environment says which points do something.
    pub fn set_up() {
        std::mem::forget(fail::FailScenario::setup());
    }

    /// A place where a part can be made to panic, or to block its thread.
    pub fn pass(point: &str) {
        fail::eval(point, |_| ());
    }

    /// The same, and the part can wait without its thread.
    pub async fn hold(point: &str) {
        if let Some(wait) = milliseconds(point) {
            tokio::time::sleep(wait).await;
        }
    }

    /// How long is waited here: what the point says, or as always.
    pub fn deadline(point: &str, always: Duration) -> Duration {
        milliseconds(point).unwrap_or(always)
    }

    fn milliseconds(point: &str) -> Option<Duration> {
        fail::eval(point, |told| told.and_then(|told| told.parse().ok()).map(Duration::from_millis)).flatten()
    }
}

#[cfg(not(feature = "fail-points"))]
mod points {
    use std::time::Duration;

    pub fn set_up() {}

    #[inline]
    pub fn pass(_: &str) {}

    #[inline]
    pub async fn hold(_: &str) {}

    #[inline]
    pub fn deadline(_: &str, always: Duration) -> Duration {
        always
    }
}
