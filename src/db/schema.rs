// @generated automatically by Diesel CLI.

diesel::table! {
    egresses (id) {
        id -> Text,
        track_id -> Text,
        state -> Text,
        server_id -> Text,
        egress_id -> Nullable<Text>,
        ticket_id -> Nullable<Text>,
        attempts -> Integer,
        restarts -> Integer,
        last_error -> Nullable<Text>,
        node -> Nullable<Text>,
        created_at -> Timestamp,
        due_at -> Timestamp,
        started_at -> Nullable<Timestamp>,
        connected_at -> Nullable<Timestamp>,
        ended_at -> Nullable<Timestamp>,
        end_reason -> Nullable<Text>,
    }
}

diesel::table! {
    measurements (id) {
        id -> Text,
        recording_id -> Text,
        service -> Text,
        kind -> Text,
        start_ms -> BigInt,
        end_ms -> BigInt,
        scores -> Text,
        warning -> Nullable<Text>,
        received_at -> Timestamp,
    }
}

diesel::table! {
    participants (id) {
        id -> Text,
        session_id -> Text,
        sid -> Text,
        identity -> Text,
        name -> Text,
        kind -> Text,
        described_at -> Nullable<Timestamp>,
        joined_at -> Nullable<Timestamp>,
        left_at -> Nullable<Timestamp>,
        role -> Text,
        metadata -> Text,
        attributes -> Text,
    }
}

diesel::table! {
    recordings (id) {
        id -> Text,
        session_id -> Nullable<Text>,
        track_id -> Text,
        meeting_id -> Text,
        room_name -> Text,
        participant -> Nullable<Text>,
        track_sid -> Nullable<Text>,
        started_at -> Timestamp,
        ended_at -> Nullable<Timestamp>,
        server_id -> Nullable<Text>,
    }
}

diesel::table! {
    seals (segment_id) {
        segment_id -> Text,
        recovered -> Bool,
        suspect -> Bool,
        tail_unverified_ms -> BigInt,
        session_offset_ms -> Nullable<BigInt>,
        drift_ppm -> Nullable<Double>,
        sha256 -> Nullable<Text>,
        width -> Nullable<Integer>,
        height -> Nullable<Integer>,
        mute_spans -> Text,
    }
}

diesel::table! {
    segments (id) {
        id -> Text,
        recording_id -> Text,
        path -> Text,
        format -> Text,
        sample_rate -> Integer,
        channels -> Integer,
        frames -> BigInt,
        bytes -> BigInt,
        started_at -> Timestamp,
        ended_at -> Nullable<Timestamp>,
        end_reason -> Nullable<Text>,
        gaps -> Text,
        ticket_id -> Nullable<Text>,
        server_id -> Nullable<Text>,
        track_sid -> Nullable<Text>,
    }
}

diesel::table! {
    servers (id) {
        id -> Text,
        seen_at -> Timestamp,
    }
}

diesel::table! {
    sessions (id) {
        id -> Text,
        meeting_id -> Text,
        room_name -> Text,
        room_sid -> Nullable<Text>,
        status -> Text,
        started_at -> Timestamp,
        ended_at -> Nullable<Timestamp>,
        metadata -> Text,
        described_at -> Nullable<Timestamp>,
    }
}

diesel::table! {
    tracks (id) {
        id -> Text,
        session_id -> Nullable<Text>,
        room_name -> Text,
        sid -> Nullable<Text>,
        identity -> Nullable<Text>,
        kind -> Text,
        source -> Text,
        name -> Text,
        mime_type -> Text,
        described_at -> Nullable<Timestamp>,
        published_at -> Nullable<Timestamp>,
        unpublished_at -> Nullable<Timestamp>,
        format_mismatch -> Nullable<Text>,
        mute_spans -> Text,
        encryption -> Text,
        wish -> Nullable<Text>,
    }
}

diesel::table! {
    transitions (id) {
        id -> Text,
        session_id -> Text,
        subject -> Nullable<Text>,
        step -> Text,
        at -> Timestamp,
        cause -> Text,
        event_id -> Nullable<Text>,
        recorded_at -> Timestamp,
    }
}

diesel::table! {
    webhook_events (id) {
        id -> Text,
        event -> Text,
        room_sid -> Nullable<Text>,
        room_name -> Nullable<Text>,
        created_at -> Timestamp,
        received_at -> Timestamp,
        understood -> Bool,
        body -> Text,
        attempts -> Integer,
        outcome -> Text,
        problem -> Nullable<Text>,
    }
}

diesel::joinable!(egresses -> tracks (track_id));
diesel::joinable!(measurements -> recordings (recording_id));
diesel::joinable!(participants -> sessions (session_id));
diesel::joinable!(recordings -> sessions (session_id));
diesel::joinable!(recordings -> tracks (track_id));
diesel::joinable!(seals -> segments (segment_id));
diesel::joinable!(segments -> recordings (recording_id));
diesel::joinable!(tracks -> sessions (session_id));
diesel::joinable!(transitions -> sessions (session_id));

diesel::allow_tables_to_appear_in_same_query!(
    egresses,
    measurements,
    participants,
    recordings,
    seals,
    segments,
    servers,
    sessions,
    tracks,
    transitions,
    webhook_events,
);
