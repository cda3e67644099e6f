import Foundation
import TestSupport
import Testing

/// Checks that Manual/, generated from the argument parser (`make manual`), matches the options.
@Suite struct ManualTests {
    private struct Help: Decodable {
        struct Name: Decodable {
            let kind: String
            let name: String
        }
        struct Argument: Decodable {
            let names: [Name]?
        }
        struct Command: Decodable {
            let commandName: String
            let arguments: [Argument]?
            let subcommands: [Command]?
        }
        let command: Command
    }

    @Test func everyOptionOfEveryVerbHasItsPlace() throws {
        let text = try require(Swimg.path, ["--experimental-dump-help"])
        let help = try JSONDecoder().decode(Help.self, from: Data(text.utf8))
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().deletingLastPathComponent()
        let verbs = (help.command.subcommands ?? []).filter { $0.commandName != "help" }
        #expect(verbs.count == 16)
        for verb in verbs {
            let page = try String(
                contentsOf: root.appendingPathComponent("Manual/swimg-\(verb.commandName).1"),
                encoding: .utf8)
            let names = (verb.arguments ?? []).flatMap { $0.names ?? [] }
            #expect(names.count > 3)
            for name in names {
                let mark = name.kind == "long" ? "-\(name.name)" : name.name
                // Further names of an option stand behind its first one.
                #expect(
                    ["Fl \(mark)", ", \(mark) "].contains { page.contains($0) },
                    "\(verb.commandName): \(name.name)")
            }
        }
    }
}
