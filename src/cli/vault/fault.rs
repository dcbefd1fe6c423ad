//! `vault fault`: faults on purpose, of a vault that is served with `--drills`.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use ureq::http::Method;

use super::client::Administration;
use super::{Target, checked_name, unexpected};
use crate::cli::output;
use crate::error::Result;
use crate::vault::VaultDir;

#[derive(Debug, Args)]
pub(super) struct FaultArgs {
    #[command(subcommand)]
    verb: FaultVerb,
}

#[derive(Debug, Subcommand)]
enum FaultVerb {
    /// Set a fault; several add up
    Set(Box<SetArgs>),
    /// Show the faults that are set, and how often each has hit
    List(ListArgs),
    /// Clear one fault, or all of them
    Clear(ClearArgs),
    /// Say which faults there are
    Kinds(ListArgs),
}

#[derive(Debug, Args)]
struct SetArgs {
    /// What goes wrong; `vault fault kinds` lists them
    kind: String,
    /// For this key alone
    #[arg(long, value_parser = checked_name)]
    key: Option<String>,
    /// For these operations alone, as get,list,wrapKey,unwrapKey
    #[arg(long = "operation", value_delimiter = ',', value_name = "OPERATION,...")]
    operations: Vec<String>,
    /// So often, and then no more
    #[arg(long)]
    count: Option<u64>,
    /// At which endpoint, where there is a choice: vault, identity or login
    #[arg(long, value_name = "ENDPOINT")]
    at: Option<String>,
    /// The HTTP status of `status`
    #[arg(long)]
    status: Option<u16>,
    /// The Retry-After of `throttled`
    #[arg(long, value_name = "SECONDS")]
    retry_after: Option<u64>,
    /// Of `clock-shift` (may be negative), `token-lifetime`, `propagation-delay`
    #[arg(long, allow_negative_numbers = true)]
    seconds: Option<i64>,
    /// Of `latency` and `trickle`
    #[arg(long)]
    milliseconds: Option<u64>,
    /// Of `truncate`
    #[arg(long)]
    bytes: Option<usize>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct ClearArgs {
    /// Number of the fault [default: all]
    id: Option<u64>,
    #[command(flatten)]
    target: Target,
}

pub(super) fn run(args: FaultArgs) -> Result<()> {
    match args.verb {
        FaultVerb::Set(args) => set(*args),
        FaultVerb::List(args) => list(&args.target),
        FaultVerb::Clear(args) => {
            let path = args.id.map(|id| format!("/{id}")).unwrap_or_default();
            let gone = items(call(&args.target, Method::DELETE, &path, None)?)?;
            if args.target.json {
                return output::json(&gone);
            }
            output::line(&format!("{} cleared", gone.len()))
        }
        FaultVerb::Kinds(args) => {
            let kinds = items(call(&args.target, Method::GET, "/kinds", None)?)?;
            if args.target.json {
                return output::json(&kinds);
            }
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let lines: Vec<String> = kinds
                .iter()
                .map(|kind| format!("{:<24} {}\n", text(&kind["kind"]), text(&kind["about"])))
                .collect();
            output::text(&lines.concat())
        }
    }
}

fn set(args: SetArgs) -> Result<()> {
    let mut body = Map::new();
    body.insert("kind".into(), json!(args.kind));
    for (name, value) in [
        ("key", args.key.map(Value::from)),
        ("count", args.count.map(Value::from)),
        ("endpoint", args.at.map(Value::from)),
        ("status", args.status.map(Value::from)),
        ("retryAfter", args.retry_after.map(Value::from)),
        ("seconds", args.seconds.map(Value::from)),
        ("milliseconds", args.milliseconds.map(Value::from)),
        ("bytes", args.bytes.map(Value::from)),
    ] {
        if let Some(value) = value {
            body.insert(name.into(), value);
        }
    }
    body.insert("operations".into(), json!(args.operations));
    let fault = call(&args.target, Method::POST, "", Some(&Value::Object(body)))?;
    if args.target.json {
        return output::json(&fault);
    }
    output::text(&line(&fault)?)
}

fn list(target: &Target) -> Result<()> {
    let faults = items(call(target, Method::GET, "", None)?)?;
    if target.json {
        return output::json(&faults);
    }
    let lines = faults.iter().map(line).collect::<Result<Vec<_>>>()?;
    output::text(&lines.concat())
}

fn line(fault: &Value) -> Result<String> {
    let kind = fault["kind"].as_str().ok_or_else(|| unexpected("kind"))?;
    let mut text = format!("{}  {kind}", fault["id"]);
    for name in [
        "endpoint",
        "key",
        "status",
        "retryAfter",
        "seconds",
        "milliseconds",
        "bytes",
        "left",
        "hits",
    ] {
        match &fault[name] {
            Value::Null => {}
            Value::String(value) => text.push_str(&format!("  {name} {value}")),
            value => text.push_str(&format!("  {name} {value}")),
        }
    }
    let operations: Vec<&str> =
        fault["operations"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !operations.is_empty() {
        text.push_str(&format!("  operations {}", operations.join(",")));
    }
    text.push('\n');
    Ok(text)
}

fn items(mut reply: Value) -> Result<Vec<Value>> {
    match reply["value"].take() {
        Value::Array(items) => Ok(items),
        _ => Err(unexpected("value")),
    }
}

fn call(target: &Target, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
    Administration::connect(VaultDir::new(&target.vault))?.faults(method, path, body)
}
