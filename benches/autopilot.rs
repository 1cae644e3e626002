//! How long it takes until everything that was published is recorded, and how long a track is without a recording when its egress dies.
//!
//! The real server against the fake LiveKit of the tests, whose egress nodes admit six starts in 15 s each, as nodes of four cores do
//! (`docs/FACTS.md`, server API). The floor is arithmetic: what the nodes admit.
//!
//! ```text
//! cargo bench --bench autopilot -- [--tracks N] [--nodes N,N,…] [--restarts N] [--short]
//! ```

#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::wildcard_enum_match_arm,
    reason = "a program that measures, with the support of the tests"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime};

use support::fake_livekit::{FakeLiveKit, Fault, Method, OUR_NAME, mic};
use support::test_app::TestApp;

/// What a node admits, and in what time it admits as many again.
const STARTS_PER_NODE: usize = 6;
const START_WINDOW: Duration = Duration::from_secs(15);
/// A real egress starts a process and joins the room before it dials.
const LAUNCH: Duration = Duration::from_millis(1_500);
/// Nothing takes longer but one node with more tracks than this is worth.
const PATIENCE: Duration = Duration::from_secs(1_800);

struct Options {
    tracks: usize,
    nodes: Vec<usize>,
    restarts: usize,
}

fn main() {
    let options = options();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!("{:>6}  {:>6}  {:>9}  {:>9}  {:>6}  {:>8}  {:>8}", "nodes", "tracks", "floor s", "taken s", "calls", "recorded", "doubled");
    for nodes in &options.nodes {
        runtime.block_on(starts(*nodes, options.tracks));
    }
    if options.restarts > 0 {
        runtime.block_on(restarts(options.restarts));
    }
}

fn options() -> Options {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options { tracks: 200, nodes: vec![1, 5, 20], restarts: 40 };
    // `cargo test --all-targets` runs it too, without this.
    let mut is_bench = false;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        match argument.as_str() {
            "--bench" => is_bench = true,
            "--short" => options = Options { tracks: 24, nodes: vec![2], restarts: 6 },
            "--tracks" => options.tracks = value().parse().expect("a number of tracks"),
            "--nodes" => options.nodes = value().split(',').map(|nodes| nodes.parse().expect("a number of nodes")).collect(),
            "--restarts" => options.restarts = value().parse().expect("a number of restarts"),
            _ => panic!("unknown argument {argument}"),
        }
    }
    if is_bench { options } else { Options { tracks: 4, nodes: vec![1], restarts: 1 } }
}

async fn server(livekit: &FakeLiveKit) -> TestApp {
    let app = TestApp::builder()
        .env("LIVEKIT_URL", livekit.ws_url())
        .env("EGRESS_WS_BASE", format!("ws://{OUR_NAME}"))
        .env("RUST_LOG", "warn,live_meeting::app=info")
        .start()
        .await;
    livekit.deliver_to(app.addr);
    app
}

/// Publishes all tracks within a second and waits until each is recorded.
async fn starts(nodes: usize, tracks: usize) {
    let livekit = FakeLiveKit::start().await;
    livekit.nodes(nodes);
    livekit.tune(|knobs| {
        (knobs.starts_per_node, knobs.start_window, knobs.dial_delay) = (STARTS_PER_NODE, START_WINDOW, LAUNCH);
    });
    let app = server(&livekit).await;
    livekit.start_room("room").await;
    let begin = Instant::now();
    let mut published = Vec::new();
    for index in 0..tracks {
        published.push(livekit.publish("room", &format!("p{index}"), mic()).await);
        tokio::time::sleep(Duration::from_secs(1).div_f64(tracks as f64)).await;
    }
    let recorded = wait_for_all(&livekit, &published).await;
    let taken = begin.elapsed();
    // Whatever would be started twice is by now: the reconciler has looked once more, from the first question to the last.
    let looks = livekit.calls(Method::ListEgress);
    while livekit.calls(Method::ListEgress) < looks + 2 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let egresses = livekit.egresses();
    let doubled = egresses.len() - egresses.iter().map(|egress| egress.track.clone()).collect::<HashSet<_>>().len();
    let rounds = tracks.div_ceil(nodes * STARTS_PER_NODE).saturating_sub(1);
    let floor = START_WINDOW.as_secs_f64() * rounds as f64 + LAUNCH.as_secs_f64();
    let calls = livekit.calls(Method::StartTrackEgress);
    println!("{nodes:>6}  {tracks:>6}  {floor:>9.1}  {:>9.1}  {calls:>6}  {recorded:>8}  {doubled:>8}", taken.as_secs_f64());
    assert_eq!((recorded, doubled), (tracks, 0), "every track is recorded, none twice");
    drop(app);
}

async fn wait_for_all(livekit: &FakeLiveKit, published: &[String]) -> usize {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sending: HashSet<String> = livekit.egresses().into_iter().filter(|egress| egress.connected).map(|egress| egress.track).collect();
        let recorded = published.iter().filter(|track| sending.contains(*track)).count();
        if recorded == published.len() || Instant::now() > deadline {
            return recorded;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Kills one egress after another, each in one of several ways, and measures the gap in its track's audio.
async fn restarts(restarts: usize) {
    let livekit = FakeLiveKit::start().await;
    livekit.tune(|knobs| knobs.dial_delay = LAUNCH);
    let app = server(&livekit).await;
    livekit.start_room("room").await;
    let mut gaps = Vec::new();
    for index in 0..restarts {
        let track = livekit.publish("room", &format!("p{index}"), mic()).await;
        let first = livekit.streaming(&track).await;
        // Every fourth restart meets a LiveKit that has no room at first.
        if index % 4 == 3 {
            livekit.fail_next(Method::StartTrackEgress, Fault::Unavailable, 2);
        }
        if index % 2 == 0 {
            livekit.crash_egress(&track).await
        } else {
            livekit.reset_egress(&track).await
        }
        let died = SystemTime::now();
        let again = livekit
            .eventually("the next egress", |livekit| livekit.active_for(&track).into_iter().find(|egress| egress.connected && egress.id != first.id));
        let again = again.await;
        assert_ne!(again.id, first.id);
        gaps.push(died.elapsed().unwrap_or_default());
    }
    gaps.sort();
    let at = |share: f64| gaps[((gaps.len() - 1) as f64 * share).round() as usize].as_secs_f64();
    println!(
        "restart gap of {restarts} egresses, {:.1} s of each a launch: p50 {:.1} s, p95 {:.1} s, longest {:.1} s (promised: p95 10 s)",
        LAUNCH.as_secs_f64(),
        at(0.5),
        at(0.95),
        at(1.0)
    );
    drop(app);
}
