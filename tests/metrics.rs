//! `GET /metrics`, for Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::TestApp;

/// Every line of the page by its name and labels, and the names that are explained and typed.
struct Page {
    values: BTreeMap<String, f64>,
    help: BTreeSet<String>,
    types: BTreeMap<String, String>,
}

async fn page(app: &TestApp) -> Page {
    let answer = app.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let text = String::from_utf8(answer.body).unwrap();
    let lines = text.strip_suffix("# EOF\n").expect("the page is whole");
    let mut page = Page { values: BTreeMap::new(), help: BTreeSet::new(), types: BTreeMap::new() };
    for line in lines.lines() {
        match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
            ["#", "HELP", name, help] => assert!(page.help.insert(name.to_owned()) && help.len() > 10, "{line}"),
            ["#", "TYPE", name, kind] => drop(page.types.insert(name.to_owned(), kind.to_owned())),
            [name, value] => assert!(page.values.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line}"),
            _ => panic!("{line:?}"),
        }
    }
    page
}

impl Page {
    #[track_caller]
    fn value(&self, name: &str) -> f64 {
        *self.values.get(name).unwrap_or_else(|| panic!("no {name} among {:?}", self.values.keys()))
    }
}

#[tokio::test]
async fn metrics_want_the_admin_key() {
    let app = TestApp::builder().start().await;
    for headers in [&[][..], &[("Authorization", "Bearer another-key-altogether")]] {
        app.request("GET", "/metrics", headers, b"").await.assert_problem(401, "unauthorized");
    }
    assert_eq!(app.get("/metrics").await.status, 200);
    app.post("/metrics", json!({})).await.assert_problem(405, "methodNotAllowed");
}

#[tokio::test]
async fn every_number_is_explained_and_totals_stay_when_a_track_ends() {
    let app = TestApp::builder().open().start().await;
    let start = page(&app).await;
    assert_eq!((start.value("live_meeting_received_bytes_total"), start.value("live_meeting_live_tracks")), (0.0, 0.0));
    let pcm = counter_pcm(48_000, 1);
    let mut peer = EgressPeer::connect(app.addr, "/egress-audio?roomName=room&participant=ana").await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    app.received("ana", pcm.len()).await;
    let during = page(&app).await;
    assert_eq!((during.value("live_meeting_received_bytes_total"), during.value("live_meeting_live_tracks")), (192_000.0, 1.0));
    peer.close_and_wait().await;
    app.eventually("the track is gone", async || (page(&app).await.value("live_meeting_live_tracks") == 0.0).then_some(())).await;
    EgressPeer::connect(app.addr, "/egress-audio").await.map(drop).expect_err("it says no room");
    assert_eq!(app.webhook(json!({"event": "room_started", "room": {"sid": "RM_1", "name": "room"}})).await.status, 204);
    app.request("POST", "/livekit/webhook", &[], b"{}").await.assert_problem(401, "unauthorized");

    let end = page(&app).await;
    for name in ["received", "recorded"] {
        assert_eq!(end.value(&format!("live_meeting_{name}_bytes_total")), 192_000.0, "{name}");
    }
    let zeros = ["lost_bytes_total", "writer_restarts_total", "spool_used_bytes", "recordings_refused", "pipeline_log_lost_lines_total"];
    for name in zeros {
        assert_eq!(end.value(&format!("live_meeting_{name}")), 0.0, "{name}");
    }
    let ones =
        ["refused_connections_total{reason=\"invalidRequest\"}", "webhooks_total{outcome=\"kept\"}", "webhooks_total{outcome=\"unauthorized\"}"];
    for name in ones {
        assert_eq!(end.value(&format!("live_meeting_{name}")), 1.0, "{name}");
    }
    let lags = end.value("live_meeting_write_lag_seconds_count");
    assert!(
        lags >= 1.0
            && end.value("live_meeting_write_lag_seconds_bucket{le=\"+Inf\"}") == lags
            && end.value("live_meeting_write_lag_seconds_sum") > 0.0
    );
    assert!(end.value("live_meeting_disk_size_bytes") >= end.value("live_meeting_disk_free_bytes"));
    assert_eq!(end.value("live_meeting_spool_size_bytes"), f64::from(512 << 20));
    assert!(end.value("process_resident_memory_bytes") > 1e6 && end.value("process_open_fds") > 5.0 && end.value("process_max_fds") > 5.0);
    for (name, kind) in &end.types {
        let has_values = end.values.keys().any(|value| value.starts_with(name.as_str()));
        assert!(has_values && end.help.contains(name) && ["counter", "gauge", "histogram"].contains(&kind.as_str()), "{name} {kind}");
        assert!(name.starts_with("live_meeting_") || name.starts_with("process_"), "{name}");
    }
    assert!(
        app.log().contains("audio that waits for the disk has room for 30 s of 93 tracks of 48 kHz stereo spool_bytes=536870912"),
        "{}",
        app.log()
    );
}

#[tokio::test]
async fn the_readme_names_every_metric() {
    let app = TestApp::builder().start().await;
    // Those that are told apart by a label are there once they have counted.
    EgressPeer::connect(app.addr, "/egress-audio?roomName=room").await.map(drop).expect_err("it has no ticket");
    app.request("POST", "/livekit/webhook", &[], b"{}").await.assert_problem(401, "unauthorized");
    let types = page(&app).await.types;
    assert!(types.len() > 30, "{types:?}");
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for (name, kind) in types {
        let name = name.strip_prefix("live_meeting_").unwrap_or(&name);
        let shown = if kind == "counter" { format!("`{name}_total") } else { format!("`{name}`") };
        assert!(readme.contains(&shown), "README.md does not name {shown}");
    }
}
