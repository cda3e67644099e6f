import Foundation
import TestSupport
import Testing

/// libguestfs, nova and others search qemu-img's help for the options that they may use.
@Suite struct QemuImgHelpTests {
    let folder: TempFolder
    let link: String

    init() throws {
        folder = try TempFolder()
        link = folder.path("qemu-img")
        try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: Swimg.path)
    }

    private func help(_ arguments: [String]) throws -> String {
        let outcome = try run(link, arguments, in: folder.path)
        #expect(outcome.status == 0 && outcome.errors.isEmpty, "\(outcome)")
        return outcome.outputText
    }

    @Test(arguments: ["--help", "-h", "help"])
    func hasALineForEachVerb(_ word: String) throws {
        let lines = try help([word]).components(separatedBy: "\n")
        #expect(lines[0].hasPrefix("qemu-img version 7.2.0 (swimg "))
        #expect(lines[1].hasPrefix("usage: qemu-img "))
        #expect(lines.contains("Command syntax:"))
        #expect(lines.suffix(2) == ["Supported formats: luks parallels qcow2 raw", ""])
        let verbs = lines.filter { $0.hasPrefix("  ") }.compactMap { $0.words.first }
        #expect(verbs == (try Verb.all().map(\.name)))
    }

    /// The patterns that libguestfs and other programs search for.
    @Test(arguments: [
        (#"\binfo\b.*-U\b"#, true), (#"^  info .*\[-f fmt\] \[--output=ofmt\]"#, true),
        (#"^  convert .*\[--target-is-zero\]"#, true), (#"\bcreate\b.*--object"#, true),
        (#"\bconvert\b.*--bitmaps"#, true), (#"\bconvert\b.*\[-r "#, true),
        (#"^  measure .*\[--size N \| "#, true), (#"^  resize .*--shrink"#, true),
    ])
    func isFoundBySearches(_ pattern: String, _ isThere: Bool) throws {
        let lines = try help(["--help"]).components(separatedBy: "\n")
        let found = lines.contains { $0.range(of: pattern, options: .regularExpression) != nil }
        #expect(found == isThere)
    }

    @Test func hasTheLineOfAVerb() throws {
        let all = try help(["--help"]).components(separatedBy: "\n")
        for verb in try Verb.all() {
            for line in ["--help", "-h", "-U --help", "-f raw x --help"] {
                if line.contains("-U"), !verb.options.keys.contains("-U") { continue }
                let text = try help([verb.name] + line.words)
                let shown = all.filter { !$0.hasPrefix("  ") || $0.hasPrefix("  \(verb.name) ") }
                #expect(text == shown.joined(separator: "\n"))
            }
        }
    }

    /// Each verb's usage line lists the options that its parser declares, and the parser accepts
    /// them.
    @Test func namesTheOptionsThatAreTaken() throws {
        let lines = try help(["--help"]).components(separatedBy: "\n")
        for verb in try Verb.all() {
            let line = try #require(lines.first { $0.hasPrefix("  \(verb.name) ") })
            let shown = Self.options(in: line)
            for option in shown {
                #expect(verb.options[option.name] == option.isValued, "\(verb.name) \(option)")
                let words = [verb.name, option.name] + (option.isValued ? ["1"] : [])
                let error = try run(link, words, in: folder.path).errorText
                for problem in ["nknown option", "nexpected argument", "issing value", "supported"]
                {
                    #expect(!error.contains(problem), "\(words): \(error)")
                }
            }
            for aliases in verb.declared {
                let names = aliases.filter { name in shown.contains { $0.name == name } }
                #expect(names.count == 1, "\(verb.name) \(aliases)")
            }
        }
    }

    /// Under its own name, the program prints its own help.
    @Test func leavesTheOwnHelpAlone() throws {
        for arguments in [["--help"], ["info", "--help"], ["help", "info"]] {
            let outcome = try run(Swimg.path, arguments)
            #expect(outcome.isSuccess && outcome.outputText.hasPrefix("OVERVIEW: "), "\(outcome)")
        }
    }

    private struct Option {
        let name: String
        let isValued: Bool
    }

    private static func options(in line: String) -> [Option] {
        line.matches(of: #/(?:\[|\| )(--?[A-Za-z][A-Za-z0-9-]*)([= ][^|])?/#).map {
            Option(name: String($0.output.1), isValued: $0.output.2 != nil)
        }
    }
}

/// A verb as the argument parser describes it.
private struct Verb {
    let name: String
    /// The names of each option.
    let declared: [[String]]
    /// Whether a value follows, by option name.
    let options: [String: Bool]

    static func all() throws -> [Verb] {
        struct Dump: Decodable {
            let command: Command
            struct Command: Decodable {
                let commandName: String
                let subcommands: [Command]?
                let arguments: [Argument]?
            }
            struct Argument: Decodable {
                let kind: String
                let names: [Name]?
            }
            struct Name: Decodable {
                let kind: String
                let name: String
            }
        }
        let text = try require(Swimg.path, ["--experimental-dump-help"])
        let verbs = try JSONDecoder().decode(Dump.self, from: Data(text.utf8)).command.subcommands
        return (verbs ?? []).filter { $0.commandName != "help" }.map { verb in
            var options: [String: Bool] = [:]
            let declared = (verb.arguments ?? []).compactMap { argument -> [String]? in
                let names = (argument.names ?? []).map {
                    ($0.kind == "short" ? "-" : "--") + $0.name
                }
                if names.isEmpty || names.contains("--help") || names == ["--version"] {
                    return nil
                }
                for name in names { options[name] = argument.kind == "option" }
                return names
            }
            return Verb(name: verb.commandName, declared: declared, options: options)
        }
    }
}
