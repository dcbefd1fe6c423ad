//! `vault key rotation-policy`: when new versions are made, and how long a version lives.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::Client;
use super::key::NameArgs;
use crate::cli::output;
use crate::error::Result;
use crate::vault::VaultDir;

#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    verb: PolicyVerb,
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// Show the policy of a key
    Show(NameArgs),
    /// Replace it; without a time to rotate after or before, the key rotates by hand alone
    Update(UpdateArgs),
}

#[derive(Debug, Args)]
struct UpdateArgs {
    #[command(flatten)]
    key: NameArgs,
    /// Rotate when a version is so old, as P90D or P2M
    #[arg(long, value_name = "DURATION", conflicts_with = "rotate_before_expiry")]
    rotate_after: Option<String>,
    /// Rotate so long before a version expires; needs --expires-in
    #[arg(long, value_name = "DURATION")]
    rotate_before_expiry: Option<String>,
    /// Versions made from now on expire after this, as P1Y
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

pub(super) fn run(args: PolicyArgs) -> Result<()> {
    match args.verb {
        PolicyVerb::Show(key) => {
            let policy = connect(&key)?.get(&path(&key))?;
            show(key.target.json, &policy)
        }
        PolicyVerb::Update(args) => update(args),
    }
}

fn update(args: UpdateArgs) -> Result<()> {
    let trigger = match (args.rotate_after, args.rotate_before_expiry) {
        (Some(time), _) => Some(json!({ "timeAfterCreate": time })),
        (None, Some(time)) => Some(json!({ "timeBeforeExpiry": time })),
        (None, None) => None,
    };
    let actions: Vec<Value> = trigger
        .into_iter()
        .map(|trigger| json!({ "trigger": trigger, "action": { "type": "Rotate" } }))
        .collect();
    let mut policy = json!({ "lifetimeActions": actions, "attributes": {} });
    if let Some(time) = args.expires_in {
        policy["attributes"]["expiryTime"] = json!(time);
    }
    let policy = connect(&args.key)?.put(&path(&args.key), &policy)?;
    show(args.key.target.json, &policy)
}

fn show(as_json: bool, policy: &Value) -> Result<()> {
    if as_json {
        return output::json(policy);
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let mut lines = Vec::new();
    for action in policy["lifetimeActions"].as_array().into_iter().flatten() {
        let trigger = &action["trigger"];
        let when = match (text(&trigger["timeAfterCreate"]), text(&trigger["timeBeforeExpiry"])) {
            (Some(time), _) => format!("{time} after creation"),
            (None, Some(time)) => format!("{time} before expiry"),
            (None, None) => "-".to_owned(),
        };
        let kind = text(&action["action"]["type"]).unwrap_or_else(|| "-".to_owned());
        lines.push(format!("{:<11} {when}\n", kind.to_lowercase()));
    }
    let expiry = text(&policy["attributes"]["expiryTime"]);
    lines.push(format!("{:<11} {}\n", "expires in", expiry.unwrap_or_else(|| "-".to_owned())));
    output::text(&lines.concat())
}

fn connect(key: &NameArgs) -> Result<Client> {
    Client::connect(VaultDir::new(&key.target.vault))
}

fn path(key: &NameArgs) -> String {
    format!("/keys/{}/rotationpolicy", key.name)
}
