//! The delivery of webhooks as livekit/protocol's notifier does it (docs/FACTS.md, webhooks), and what a test may do to it.
//!
//! One queue for each room name and each egress, from memory. One delivery at a time in each, tried again on transport errors, 429 and
//! 5xx but 501. A task drains a queue while there is something in it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use live_meeting::livekit::webhook::sign;
use livekit_protocol as proto;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::Shared;
use crate::support::http::{Response, parse_response};
use crate::support::test_app::{API_KEY, API_SECRET};

const PATH: &str = "/livekit/webhook";
/// Attempts in all: go-retryablehttp's first and its four repetitions.
const ATTEMPTS: u32 = 5;
/// The longest pause, in units of the first (go-retryablehttp: 30 s of 1 s).
const MAX_BACKOFF: u32 = 30;

/// What a filter decides on an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Deliver,
    Drop,
    DeliverTwice,
    /// Kept aside, without holding up what comes after it, until `release_webhooks`.
    HoldUntilReleased,
}

pub type Filter = Arc<dyn Fn(&str) -> Verdict + Send + Sync>;

/// What became of a webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// In its queue, or being sent.
    Waiting,
    Held,
    /// By the test's will, or because there is nobody to send it to.
    Dropped,
    /// With this status, which LiveKit takes for final.
    Answered(u16),
    /// After the last attempt.
    GaveUp,
    TooOld,
    Overflow,
}

#[derive(Clone, Debug)]
pub struct Delivery {
    pub event: proto::WebhookEvent,
    pub body: Arc<[u8]>,
    pub queued_at: Instant,
    /// The statuses of its attempts; `None` is a transport error.
    pub answers: Vec<Option<u16>>,
    pub fate: Fate,
    key: String,
}

impl Delivery {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a webhook is JSON")
    }
}

pub struct Webhooks {
    pub target: Option<SocketAddr>,
    pub second_target: Option<SocketAddr>,
    pub lose_all: bool,
    pub lose_next: usize,
    pub duplicate: bool,
    pub filter: Option<Filter>,
    /// Every webhook there was to send, in the order of what happened.
    pub deliveries: Vec<Delivery>,
    /// What waits, as places in `deliveries`. A queue that is here is being drained.
    queues: HashMap<String, VecDeque<usize>>,
    pub backoff: Duration,
    pub max_age: Duration,
    pub max_depth: usize,
}

impl Default for Webhooks {
    /// LiveKit's numbers, but that a second of back-off lasts 10 ms.
    fn default() -> Self {
        Self {
            target: None,
            second_target: None,
            lose_all: false,
            lose_next: 0,
            duplicate: false,
            filter: None,
            deliveries: Vec::new(),
            queues: HashMap::new(),
            backoff: Duration::from_millis(10),
            max_age: Duration::from_secs(30),
            max_depth: 200,
        }
    }
}

impl Webhooks {
    /// Queues events; the queues that have to be drained from now on are returned.
    pub fn queue(&mut self, events: Vec<proto::WebhookEvent>) -> Vec<String> {
        let mut idle = Vec::new();
        for event in events {
            let verdict = self.judge(&event.event);
            let key = match (&event.egress_info, &event.room) {
                (Some(info), _) => info.egress_id.clone(),
                (None, room) => format!("room {}", room.as_ref().map_or("", |room| &room.name)),
            };
            let body = serde_json::to_vec(&event).expect("an event is JSON").into();
            let fate = match verdict {
                Verdict::Deliver | Verdict::DeliverTwice => Fate::Waiting,
                Verdict::Drop => Fate::Dropped,
                Verdict::HoldUntilReleased => Fate::Held,
            };
            let delivery = Delivery { event, body, queued_at: Instant::now(), answers: Vec::new(), fate, key };
            if verdict == Verdict::DeliverTwice {
                self.deliveries.push(delivery.clone());
                idle.extend(self.line_up(self.deliveries.len() - 1));
            }
            self.deliveries.push(delivery);
            if fate == Fate::Waiting {
                idle.extend(self.line_up(self.deliveries.len() - 1));
            }
        }
        idle
    }

    /// Queues what was held back, in its order.
    pub fn release(&mut self) -> Vec<String> {
        let held: Vec<usize> = (0..self.deliveries.len()).filter(|at| self.deliveries[*at].fate == Fate::Held).collect();
        for at in &held {
            (self.deliveries[*at].fate, self.deliveries[*at].queued_at) = (Fate::Waiting, Instant::now());
        }
        held.into_iter().filter_map(|at| self.line_up(at)).collect()
    }

    fn judge(&mut self, event: &str) -> Verdict {
        if self.lose_all || self.target.is_none() {
            return Verdict::Drop;
        }
        if self.lose_next > 0 {
            self.lose_next -= 1;
            return Verdict::Drop;
        }
        match &self.filter {
            Some(filter) => filter(event),
            None if self.duplicate => Verdict::DeliverTwice,
            None => Verdict::Deliver,
        }
    }

    fn line_up(&mut self, at: usize) -> Option<String> {
        let key = self.deliveries[at].key.clone();
        let idle = !self.queues.contains_key(&key);
        let queue = self.queues.entry(key.clone()).or_default();
        if queue.len() >= self.max_depth {
            self.deliveries[at].fate = Fate::Overflow;
            return None;
        }
        queue.push_back(at);
        idle.then_some(key)
    }

    /// The next to be sent of a queue, which ends with `None`.
    fn next(&mut self, key: &str) -> Option<(usize, Arc<[u8]>)> {
        loop {
            let Some(at) = self.queues.get_mut(key).and_then(VecDeque::pop_front) else {
                self.queues.remove(key);
                return None;
            };
            let delivery = &mut self.deliveries[at];
            if delivery.queued_at.elapsed() <= self.max_age {
                return Some((at, Arc::clone(&delivery.body)));
            }
            delivery.fate = Fate::TooOld;
        }
    }
}

/// Sends what is in a queue until it is empty.
pub async fn drain(shared: Arc<Shared>, key: String) {
    while let Some((at, body)) = shared.change(|state| state.webhooks.next(&key)) {
        let token = sign(API_KEY, API_SECRET, &body).expect("signed");
        let mut fate = Fate::GaveUp;
        for attempt in 0..ATTEMPTS {
            let (target, backoff) = shared.look(|state| (state.webhooks.target, state.webhooks.backoff));
            let answer = match target {
                Some(target) => post(target, &token, &body).await.ok(),
                None => None,
            };
            let status = answer.as_ref().map(|answer| answer.status);
            shared.change(|state| state.webhooks.deliveries[at].answers.push(status));
            match status {
                None | Some(429 | 500 | 502..=599) => {}
                Some(status) => {
                    fate = Fate::Answered(status);
                    break;
                }
            }
            let asked = answer.filter(|answer| matches!(answer.status, 429 | 503)).and_then(|answer| answer.header("retry-after")?.parse().ok());
            if attempt + 1 < ATTEMPTS {
                sleep(backoff * asked.unwrap_or(1 << attempt).min(MAX_BACKOFF)).await;
            }
        }
        if let Some(second) = shared.look(|state| state.webhooks.second_target) {
            post(second, &token, &body).await.ok(); // it may be down
        }
        shared.change(|state| state.webhooks.deliveries[at].fate = fate);
    }
}

/// One attempt, with no limit to its time, as LiveKit's client has none.
async fn post(target: SocketAddr, token: &str, body: &[u8]) -> io::Result<Response> {
    let mut stream = TcpStream::connect(target).await?;
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: LiveKit\r\nContent-Length: {}\r\nAuthorization: {token}\r\n\
         Content-Type: application/webhook+json\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    if !answer.windows(4).any(|window| window == b"\r\n\r\n") {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(parse_response(&answer, false))
}
