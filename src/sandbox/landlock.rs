//! Landlock: what no file mode and no capability would refuse.
//!
//! Rules for paths would be the obvious use, and are not possible where guests' files are served. Files are reached
//! by handle, and the kernel cannot tell the path of a file so reached once its name has left the kernel's cache:
//! Landlock refuses it then. So threads that serve files have rules without paths; the others may neither run
//! programs nor make or command devices.

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Failure, Role};

const LAYER: &str = "Landlock";

/// The newest version whose rights are named here; older hosts take what they know.
const VERSION: ABI = ABI::V6;

/// What the process never does. Returns what the host does not give.
pub fn restrict_process() -> Result<Option<String>, Failure> {
    let failed = |error: ::landlock::RulesetError| Failure::new(LAYER, error);
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::BindTcp)
        .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(failed)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => {
            Some("Landlock is older than version 6 here: some rules are missing".into())
        }
        RulesetStatus::NotEnforced => Some("no Landlock: the host lacks it".into()),
    })
}

/// What threads of this role never do.
pub fn restrict_thread(role: Role) -> Result<(), Failure> {
    let outcome = match role {
        // They start threads of several kinds, each of which restricts itself.
        Role::Main | Role::Control | Role::Api | Role::WorkerStarter => return Ok(()),
        Role::Net => no_devices(false),
        Role::Decode | Role::Log | Role::Metrics | Role::Lane => no_devices(true),
        // Rules for files would forbid the last one to unmount.
        Role::Queue | Role::Worker | Role::Deadlines | Role::Helper | Role::Unmount => no_network(),
    };
    outcome.map_err(|error| Failure::new(LAYER, error))
}

fn no_network() -> Result<(), Box<dyn std::error::Error>> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::ConnectTcp)?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn no_devices(offline: bool) -> Result<(), Box<dyn std::error::Error>> {
    let every = AccessFs::from_all(VERSION);
    let never: BitFlags<AccessFs> = AccessFs::Execute
        | AccessFs::MakeChar
        | AccessFs::MakeBlock
        | AccessFs::MakeFifo
        | AccessFs::MakeSock
        | AccessFs::MakeSym
        | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(every)?;
    if offline {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    rules
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, every & !never))?
        .restrict_self()?;
    Ok(())
}
