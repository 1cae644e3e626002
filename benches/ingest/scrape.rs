//! What the server says of itself on `/metrics`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::ADMIN_KEY;

/// The cumulative classes of a histogram: their upper bounds in milliseconds, `None` for the last, and how many observations are within.
#[derive(Debug, Default)]
pub struct Classes(Vec<(Option<u64>, f64)>);

impl Classes {
    /// # Errors
    /// When the server has no such histogram of seconds.
    pub fn read(address: SocketAddr, histogram: &str) -> anyhow::Result<Self> {
        let page = metrics(address)?;
        let mut classes = Vec::new();
        for line in page.lines() {
            let Some(class) = line.strip_prefix(histogram).and_then(|rest| rest.strip_prefix("_bucket{le=\"")) else { continue };
            let (bound, count) = class.split_once("\"} ").with_context(|| format!("not a class: {line}"))?;
            let bound = Some(bound.parse::<f64>()?).filter(|bound| bound.is_finite()).map(Duration::from_secs_f64);
            classes.push((bound.map(|bound| u64::try_from(bound.as_millis())).transpose()?, count.parse()?));
        }
        ensure!(!classes.is_empty(), "no {histogram} in the metrics");
        Ok(Self(classes))
    }

    /// The bound of the class that holds 99 of 100 observations since `earlier`; `None` beyond all bounds.
    pub fn p99_ms_since(&self, earlier: &Self) -> Option<u64> {
        let since: Vec<f64> = self.0.iter().zip(&earlier.0).map(|((_, now), (_, then))| now - then).collect();
        let all = since.last().copied().unwrap_or_default();
        self.0.iter().zip(since).find(|(_, count)| *count >= all * 0.99).and_then(|((bound, _), _)| *bound)
    }
}

fn metrics(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("no answer of /metrics")?;
    ensure!(answer.lines().next().is_some_and(|status| status.contains(" 200 ")), "/metrics answered: {answer:.200}");
    Ok(answer)
}
