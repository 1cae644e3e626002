//! LiveKit's side: signed events at their times, each answer measured from when its event was due.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use live_meeting::livekit::webhook::sign;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::since;

pub const API_KEY: &str = "bench-key";
pub const API_SECRET: &str = "a-livekit-secret-for-the-benchmark-012345";
pub const PATH: &str = "/livekit/webhook";

const ROOMS: u32 = 20;
const PARTICIPANTS_OF_A_LIFE: u32 = 10;
/// Enough that one is free unless the sink has stalled: at 1,000 events a second, for an eighth of a second.
const CONNECTIONS: usize = 128;
/// LiveKit gives up later, but nobody waits for it here.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections are made and this passes before the first event is due.
const WARM_UP: Duration = Duration::from_millis(500);

/// What became of the events.
#[derive(Default)]
pub struct Answers {
    /// From when an event was due to the end of its answer; sorted.
    times: Vec<Duration>,
    pub taken: u64,
    pub errors: u64,
    pub first_fault: Option<String>,
    pub lateness: Duration,
    slowest: Duration,
    /// When the event was due that waited longest for its answer, from the first on.
    pub slowest_at: Duration,
}

impl Answers {
    /// The time within which so many percent were answered.
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.times.len() * percent).div_ceil(100);
        self.times.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }
}

/// Whole requests, in the order in which they are due.
pub fn requests(rate: u32, seconds: u32) -> anyhow::Result<VecDeque<Vec<u8>>> {
    (0..rate * seconds).map(|number| request(&body(number))).collect()
}

fn request(body: &str) -> anyhow::Result<Vec<u8>> {
    let token = sign(API_KEY, API_SECRET, body.as_bytes()).context("cannot sign")?;
    let length = body.len();
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/webhook+json\r\nAuthorization: {token}\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    Ok(head.into_bytes())
}

/// The event with this number of all: the rooms take turns, and each tells of one participant after the other.
fn body(number: u32) -> String {
    const STEPS: [&str; 4] = ["participant_joined", "track_published", "track_unpublished", "participant_left"];
    let (room, turn) = (number % ROOMS, number / ROOMS);
    let events_of_a_life = 2 + PARTICIPANTS_OF_A_LIFE * 4;
    let (life, turn) = (turn / events_of_a_life, turn % events_of_a_life);
    let sid = format!("RM_{room}_{life}");
    let now = chrono::Utc::now().timestamp();
    let whole = json!({"sid": sid, "name": format!("room-{room}"), "creationTime": now.to_string(), "metadata": r#"{"topic":"standup"}"#,
        "emptyTimeout": 300, "departureTimeout": 20, "enabledCodecs": [{"mime": "audio/opus"}, {"mime": "audio/red"}, {"mime": "video/VP8"}]});
    let part = json!({"sid": sid, "name": format!("room-{room}")});
    let (name, room, more): (&str, Value, Value) = if turn == 0 {
        ("room_started", whole, json!({}))
    } else if turn == events_of_a_life - 1 {
        ("room_finished", whole, json!({}))
    } else {
        let (person, step) = ((turn - 1) / 4, (turn - 1) % 4);
        let (participant, identity) = (format!("PA_{room}_{life}_{person}"), format!("person-{person}"));
        let track = json!({"sid": format!("TR_{room}_{life}_{person}"), "source": "MICROPHONE", "name": "mic", "mimeType": "audio/red"});
        let name = *STEPS.get(usize::try_from(step).unwrap_or_default()).unwrap_or(&"");
        if name.starts_with("track_") {
            (name, part, json!({"participant": {"sid": participant, "identity": identity}, "track": track}))
        } else {
            let participant = json!({"sid": participant, "identity": identity, "name": "Somebody", "state": "ACTIVE", "joinedAt": now.to_string(),
                "attributes": {"role": "guest"}, "permission": {"canSubscribe": true, "canPublish": true}});
            (name, whole, json!({"participant": participant}))
        }
    };
    let mut event = json!({"event": name, "id": format!("EV_{number}"), "createdAt": now.to_string(), "room": room});
    if let (Some(event), Value::Object(more)) = (event.as_object_mut(), more) {
        event.extend(more);
    }
    event.to_string()
}

/// Sends each request when it is due and waits for all answers.
pub fn run(address: SocketAddr, requests: VecDeque<Vec<u8>>, rate: u32) -> anyhow::Result<Answers> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connections = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            connections.push(connect(address).await.context("cannot connect")?);
        }
        let start = Instant::now() + WARM_UP;
        let schedule = std::rc::Rc::new(Schedule { waiting: Mutex::new((0, requests)), start, rate, answers: Mutex::default() });
        let local = tokio::task::LocalSet::new();
        for connection in connections {
            let schedule = std::rc::Rc::clone(&schedule);
            local.spawn_local(async move { schedule.work(connection, address).await });
        }
        local.await;
        let mut answers = std::mem::take(&mut *schedule.answers.lock().expect("no thread has panicked"));
        answers.times.sort_unstable();
        Ok(answers)
    })
}

struct Schedule {
    /// The number of the next, and those that are not sent yet.
    waiting: Mutex<(u32, VecDeque<Vec<u8>>)>,
    start: Instant,
    rate: u32,
    answers: Mutex<Answers>,
}

impl Schedule {
    async fn work(&self, mut connection: TcpStream, address: SocketAddr) {
        loop {
            let taken_at = Instant::now();
            let Some((due, request)) = self.next() else { return };
            tokio::time::sleep_until(due.into()).await;
            let lateness = since(due.max(taken_at));
            let answer = match tokio::time::timeout(ANSWER_TIMEOUT, exchange(&mut connection, &request)).await {
                Ok(answer) => answer,
                Err(_) => Err(anyhow::anyhow!("no answer within {ANSWER_TIMEOUT:?}")),
            };
            let took = since(due);
            let fault = match &answer {
                Ok(204) => None,
                Ok(status) => Some(format!("answered {status}")),
                Err(error) => Some(format!("{error:#}")),
            };
            if answer.is_err()
                && let Ok(another) = connect(address).await
            {
                connection = another;
            }
            self.note(due, took, lateness, fault);
        }
    }

    fn next(&self) -> Option<(Instant, Vec<u8>)> {
        let mut waiting = self.waiting.lock().expect("no thread has panicked");
        let request = waiting.1.pop_front()?;
        let due = self.start + Duration::from_secs(1) * waiting.0 / self.rate;
        waiting.0 += 1;
        Some((due, request))
    }

    fn note(&self, due: Instant, took: Duration, lateness: Duration, fault: Option<String>) {
        let mut answers = self.answers.lock().expect("no thread has panicked");
        if took > answers.slowest {
            answers.slowest = took;
            answers.slowest_at = due.saturating_duration_since(self.start);
        }
        answers.times.push(took);
        answers.lateness = answers.lateness.max(lateness);
        match fault {
            None => answers.taken += 1,
            Some(fault) => {
                answers.errors += 1;
                answers.first_fault.get_or_insert(fault);
            }
        }
    }
}

async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let connection = TcpStream::connect(address).await?;
    connection.set_nodelay(true)?;
    Ok(connection)
}

/// One request and the status of its answer.
async fn exchange(connection: &mut TcpStream, request: &[u8]) -> anyhow::Result<u16> {
    connection.write_all(request).await?;
    let mut answer = Vec::with_capacity(512);
    loop {
        if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(answer.get(..end).unwrap_or_default()).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0_usize);
            if answer.len() >= end + 4 + length {
                let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                return status.context("no status in the answer");
            }
        }
        if connection.read_buf(&mut answer).await? == 0 {
            bail!("the connection was closed");
        }
    }
}
