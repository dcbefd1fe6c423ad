//! `vault role`: role assignments.

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use ureq::http::Method;

use super::client::Client;
use super::{Target, checked_name, unexpected};
use crate::cli::output;
use crate::error::{Error, Kind, Result};
use crate::vault::{Role, VaultDir};

#[derive(Debug, Args)]
pub(super) struct RoleArgs {
    #[command(subcommand)]
    verb: RoleVerb,
}

#[derive(Debug, Subcommand)]
enum RoleVerb {
    /// Give an identity a role, on the vault or on one key
    Assign(ChangeArgs),
    /// Take it away
    Remove(ChangeArgs),
    /// List the role assignments
    List(ListArgs),
}

#[derive(Debug, Args)]
struct ChangeArgs {
    /// Name of the identity
    #[arg(long, value_parser = checked_name)]
    identity: String,
    /// The role's name or id, as "Key Vault Crypto Service Encryption User"
    #[arg(long, value_parser = checked_role)]
    role: Role,
    /// The key that it is limited to [default: the whole vault]
    #[arg(long, value_parser = checked_name)]
    key: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    target: Target,
}

fn checked_role(text: &str) -> Result<Role, String> {
    Role::from_name(text).ok_or_else(|| {
        let names: Vec<&str> = Role::ALL.iter().map(|role| role.name()).collect();
        format!("the roles are: {}", names.join(", "))
    })
}

pub(super) fn run(args: RoleArgs) -> Result<()> {
    match args.verb {
        RoleVerb::Assign(args) => assign(args),
        RoleVerb::Remove(args) => remove(args),
        RoleVerb::List(args) => list(args),
    }
}

fn assign(args: ChangeArgs) -> Result<()> {
    let mut body = json!({ "identity": args.identity, "role": args.role.name() });
    if let Some(key) = &args.key {
        body["key"] = json!(key);
    }
    let made = connect(&args.target)?.administer(Method::POST, "/roleassignments", Some(&body))?;
    show(args.target.json, &made)
}

fn remove(args: ChangeArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let same = |one: &Value| {
        let is = |field: &str, wanted: &str| {
            one[field].as_str().is_some_and(|own| own.eq_ignore_ascii_case(wanted))
        };
        is("identity", &args.identity)
            && is("role", args.role.name())
            && match &args.key {
                Some(key) => is("key", key),
                None => one["key"].is_null(),
            }
    };
    // A deleted identity whose tokens were kept may have had the name before: whoever takes a role
    // away must not be left with one that still has it.
    let found: Vec<Value> = all(&client)?.into_iter().filter(same).collect();
    let newest = found.last().ok_or_else(|| {
        Error::new(
            Kind::Denied,
            format!("{} does not have the role {} there", args.identity, args.role.name()),
        )
    })?;
    for one in &found {
        let id = one["id"].as_str().ok_or_else(|| unexpected("id"))?;
        client.administer(Method::DELETE, &format!("/roleassignments/{id}"), None)?;
    }
    show(args.target.json, newest)
}

fn list(args: ListArgs) -> Result<()> {
    let all = all(&connect(&args.target)?)?;
    if args.target.json {
        return output::json(&all);
    }
    let lines = all.iter().map(line).collect::<Result<Vec<_>>>()?;
    output::text(&lines.concat())
}

fn all(client: &Client) -> Result<Vec<Value>> {
    match client.administer(Method::GET, "/roleassignments", None)?["value"].take() {
        Value::Array(all) => Ok(all),
        _ => Err(unexpected("value")),
    }
}

fn show(as_json: bool, assignment: &Value) -> Result<()> {
    if as_json { output::json(assignment) } else { output::text(&line(assignment)?) }
}

fn line(assignment: &Value) -> Result<String> {
    let role = assignment["role"].as_str().ok_or_else(|| unexpected("role"))?;
    let identity = assignment["identity"].as_str().unwrap_or("-");
    let scope =
        assignment["key"].as_str().map_or("the vault".to_owned(), |key| format!("key {key}"));
    Ok(format!("{identity}  {role}  on {scope}\n"))
}

fn connect(target: &Target) -> Result<Client> {
    Client::connect(VaultDir::new(&target.vault))
}
